# SPDX-License-Identifier: MIT
#
# cmake -D ROOT=<repository> -P readme_program.cmake: the README's first program is the one that is compiled and run.
file(READ "${ROOT}/examples/first_program.cpp" source)
string(REGEX MATCH "// \\[readme\\]\n(.*)// \\[readme end\\]" _ "${source}")
set(wanted "```cpp\n${CMAKE_MATCH_1}```")
file(READ "${ROOT}/README.md" readme)
string(FIND "${readme}" "${wanted}" at)
if(CMAKE_MATCH_1 STREQUAL "" OR at EQUAL -1)
  message(FATAL_ERROR "README.md does not show examples/first_program.cpp between its [readme] marks, word by word")
endif()
