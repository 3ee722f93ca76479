# SPDX-License-Identifier: MIT
#
# Compiles a file once for each macro that its head names, with -O2, and looks for names in the object files:
# cmake -D CASE=x.cpp -D NM=nm -D INCLUDES=... -D OBJECTS=folder -P this -- compiler flags...
#   // SENDER_OFF without zero checks: regular expression     must not be found by nm
#   // SENDER_ON with zero checks: regular expression         must be found

cmake_minimum_required(VERSION 3.24)

set(command)
set(after_dashes FALSE)
math(EXPR last "${CMAKE_ARGC} - 1")
foreach(i RANGE ${last})
  if(after_dashes)
    list(APPEND command "${CMAKE_ARGV${i}}")
  elseif(CMAKE_ARGV${i} STREQUAL "--")
    set(after_dashes TRUE)
  endif()
endforeach()
foreach(directory IN LISTS INCLUDES)
  list(APPEND command "-I${directory}")
endforeach()

file(MAKE_DIRECTORY "${OBJECTS}")
file(STRINGS "${CASE}" heads REGEX "^// [A-Z_]+ +(with|without) ")
set(macros)
foreach(head IN LISTS heads)
  string(REGEX MATCH "^// ([A-Z_]+) +(without|with) ([^:]+): (.+)$" _ "${head}")
  set(macro "${CMAKE_MATCH_1}")
  set(which "${CMAKE_MATCH_2}")
  set(what "${CMAKE_MATCH_3}")
  set(pattern "${CMAKE_MATCH_4}")
  if(NOT macro IN_LIST macros)
    list(APPEND macros ${macro})
    set(object "${OBJECTS}/${macro}.o")
    execute_process(
      COMMAND ${command} -O2 -DNDEBUG "-D${macro}" -c "${CASE}" -o "${object}" COMMAND_ERROR_IS_FATAL ANY
    )
    execute_process(COMMAND "${NM}" -C "${object}" OUTPUT_VARIABLE names_${macro} COMMAND_ERROR_IS_FATAL ANY)
    string(REGEX REPLACE "[][;]" "," names_${macro} "${names_${macro}}")
    string(REPLACE "\n" ";" names_${macro} "${names_${macro}}")
  endif()
  set(found ${names_${macro}})
  list(FILTER found INCLUDE REGEX "${pattern}")
  list(LENGTH found count)
  message("${macro} ${which} ${what}: ${count} names")
  if(which STREQUAL "without" AND count GREATER 0)
    list(JOIN found "\n  " found)
    message(SEND_ERROR "${macro}: the machine code has ${what}:\n  ${found}")
  elseif(which STREQUAL "with" AND count EQUAL 0)
    message(SEND_ERROR "${macro}: the machine code has no ${what}: does the pattern still fit?")
  endif()
endforeach()
list(LENGTH macros count)
if(count LESS 2)
  message(FATAL_ERROR "no cases")
endif()
