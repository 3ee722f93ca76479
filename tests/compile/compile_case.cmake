# SPDX-License-Identifier: MIT
#
# Compiles one case and judges the outcome: cmake -D CASE=x.cpp -D EXPECTED=text -D INCLUDES=... -P this -- compiler
# flags... Without EXPECTED it has to compile, and warn where the case says so; with it it must not, and say that text.

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

execute_process(
  COMMAND ${command} -fsyntax-only "${CASE}"
  RESULT_VARIABLE status
  OUTPUT_VARIABLE output
  ERROR_VARIABLE output
)
# Compilers repeat source lines below their messages; a text counts only where something is reported. Brackets and
# semicolons have a meaning in lists.
string(REGEX REPLACE "[][;]" "," messages "${output}")
string(REPLACE "\n" ";" messages "${messages}")

if(EXPECTED)
  message("${output}")
  if(status EQUAL 0)
    message(FATAL_ERROR "compiles, but must not")
  endif()
  string(REGEX REPLACE "[][;]" "," expected "${EXPECTED}")
  foreach(line IN LISTS messages)
    string(FIND "${line}" "${expected}" at)
    if(line MATCHES "error:" AND NOT at EQUAL -1)
      return()
    endif()
  endforeach()
  message(FATAL_ERROR "no error message says: ${EXPECTED}")
endif()

if(NOT status EQUAL 0)
  message("${output}")
  message(FATAL_ERROR "does not compile, but must")
endif()

# Line by line: where the case says that a result is dropped, and where the compiler does.
set(warned)
cmake_path(GET CASE FILENAME name)
foreach(line IN LISTS messages)
  if(line MATCHES "${name}:([0-9]+):.*warning: ignoring")
    list(APPEND warned ${CMAKE_MATCH_1})
  endif()
endforeach()
file(READ "${CASE}" source)
string(REGEX REPLACE "[][;]" "," source "${source}")
string(REPLACE "\n" ";" source "${source}")
set(number 0)
set(count 0)
foreach(line IN LISTS source)
  math(EXPR number "${number} + 1")
  if(line MATCHES "// dropped$")
    math(EXPR count "${count} + 1")
    if(NOT number IN_LIST warned)
      message(SEND_ERROR "line ${number}: the compiler lets it pass: ${line}")
    endif()
  elseif(number IN_LIST warned)
    message(SEND_ERROR "line ${number}: the compiler warns of more than is expected: ${line}")
  endif()
endforeach()
message("compiles; ${count} dropped results, and a warning for each")
