# SPDX-License-Identifier: MIT
#
# Shows that the layering check can fail: layering_fixture/ holds one wrong include of each kind, and the checker must
# name each of them and nothing else.
#   cmake -P tests/layering_selftest.cmake

cmake_minimum_required(VERSION 3.24)

set(expected
    "format/packet.hpp (level 7) must not include sender.hpp (level 11)"
    "format/ring_a.hpp, format/ring_b.hpp"
    "zero/policy.hpp must not include memory/detail/inner.hpp: detail/ belongs to memory/"
    "transport/fd.hpp (level 8) must not include memory/ram_map.hpp (level 2)"
    "transport/fd.hpp must not include zlib.h"
    "engine/worker.hpp must not include boost/lockfree/spsc_queue.hpp"
    "engine/worker.hpp must not include multifd/compress/zlib.hpp"
    "engine/worker.hpp (level 6) must not include compress/zlib.hpp (level 8)"
    "engine/worker.hpp must not include \"worker_detail.hpp\""
    "testing/check.hpp must not include multifd/multifd.hpp"
    "testing/check.hpp (level 14) must not include multifd.hpp (level 14)"
    "testing/check.hpp includes gone.hpp, which does not exist"
    "stranger.hpp has no row"
)
list(LENGTH expected expected_count)

execute_process(
  COMMAND
    "${CMAKE_COMMAND}" -D "ROOT=${CMAKE_CURRENT_LIST_DIR}/layering_fixture" -P
    "${CMAKE_CURRENT_LIST_DIR}/layering.cmake"
  RESULT_VARIABLE status
  OUTPUT_VARIABLE output
  ERROR_VARIABLE output
)
message("${output}")
if(status EQUAL 0)
  message(FATAL_ERROR "the checker accepted the fixture")
endif()
foreach(text IN LISTS expected)
  string(FIND "${output}" "${text}" at)
  if(at EQUAL -1)
    message(FATAL_ERROR "the checker did not say: ${text}")
  endif()
endforeach()
if(NOT output MATCHES "layering: ${expected_count} forbidden")
  message(FATAL_ERROR "the checker refused something else than the ${expected_count} wrong includes")
endif()
