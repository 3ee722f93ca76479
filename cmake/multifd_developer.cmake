# SPDX-License-Identifier: MIT
#
# What our own programs and tests are built with. Nothing of it reaches a user of the library.

set(CMAKE_CXX_EXTENSIONS OFF)

add_library(multifd_developer INTERFACE)
target_compile_options(
  multifd_developer
  INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wnon-virtual-dtor
)
