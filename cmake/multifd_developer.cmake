# SPDX-License-Identifier: MIT
#
# What our own programs and tests are built with. Nothing of it reaches a user of the library.

set(CMAKE_CXX_EXTENSIONS OFF)

# What nearly every test, and nearly every program, reads, compiled once each: a quarter of the time. Not with ccache,
# which has to be told more about it, and not where a forgotten #include is to be noticed: tests/run.sh --night.
option(MULTIFD_PRECOMPILE "Precompile the headers that tests and programs share (tests/run.sh without ccache)" OFF)

add_library(multifd_developer INTERFACE)
target_compile_options(
  multifd_developer
  INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wnon-virtual-dtor
)
