# SPDX-License-Identifier: MIT
#
# cmake -D ROOT=<repository> -P readme_program.cmake: every program in README.md and include/multifd/README.md is one that is
# compiled and run.
function(check document)
  file(READ "${ROOT}/${document}" text)
  foreach(program IN LISTS ARGN)
    file(READ "${ROOT}/examples/${program}.cpp" source)
    string(REGEX MATCH "// \\[readme\\]\n(.*)// \\[readme end\\]" _ "${source}")
    set(wanted "```cpp\n${CMAKE_MATCH_1}```")
    string(FIND "${text}" "${wanted}" at)
    if(CMAKE_MATCH_1 STREQUAL "" OR at EQUAL -1)
      message(SEND_ERROR "${document} does not show examples/${program}.cpp between its [readme] marks, word by word")
    endif()
  endforeach()
  string(REGEX MATCHALL "```cpp" blocks "${text}")
  list(LENGTH blocks shown)
  list(LENGTH ARGN compiled)
  if(NOT shown EQUAL compiled)
    message(SEND_ERROR "${document} shows ${shown} blocks of C++, of which ${compiled} are compiled")
  endif()
endfunction()

check(README.md vmm_in_sixty_lines first_program)
check(include/multifd/README.md custom_policy precopy save_and_load)
