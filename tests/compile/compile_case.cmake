# SPDX-License-Identifier: MIT
#
# Compiles one case and judges the outcome: cmake -D CASE=x_fail.cpp -D INCLUDES=... -P this -- compiler flags...

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
message("${output}")

if(CASE MATCHES "_ok\\.cpp$")
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "does not compile, but must")
  endif()
  return()
endif()

file(STRINGS "${CASE}" first_line LIMIT_COUNT 1)
if(NOT first_line MATCHES "^// expect: (.+)$")
  message(FATAL_ERROR "the first line must be  // expect: <text of the error message>")
endif()
set(expected "${CMAKE_MATCH_1}")
if(status EQUAL 0)
  message(FATAL_ERROR "compiles, but must not")
endif()
# Compilers repeat source lines below their messages; the text counts only where an error is reported.
string(REPLACE ";" "," output "${output}")
string(REPLACE ";" "," expected "${expected}")
string(REPLACE "\n" ";" lines "${output}")
foreach(line IN LISTS lines)
  string(FIND "${line}" "${expected}" at)
  if(line MATCHES "error:" AND NOT at EQUAL -1)
    return()
  endif()
endforeach()
message(FATAL_ERROR "no error message says: ${expected}")
