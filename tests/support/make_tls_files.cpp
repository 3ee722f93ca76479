// SPDX-License-Identifier: MIT
//
// Makes the certificates and keys of tls_files.hpp for tests that are scripts: make_tls_files FOLDER
#include <cstdio>
#include <exception>

#include "support/tls_files.hpp"

int main(int argc, char** argv) try {
  if (argc != 2) return std::fputs("usage: make_tls_files FOLDER\n", stderr), 2;
  test::make_tls_files(argv[1]);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "make_tls_files: %s\n", error.what());
  return 1;
}
