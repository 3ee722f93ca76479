# SPDX-License-Identifier: MIT
#
# Shows that the layering check can fail: layering_fixture/ holds one wrong include of each kind, and the checker must
# name each of them and nothing else.
#   cmake -P tests/layering_selftest.cmake

cmake_minimum_required(VERSION 3.24)

set(expected
    "wire/packet.hpp (level 2) must not include sender.hpp (level 8)"
    "wire/ring_a.hpp, wire/ring_b.hpp"
    "zero/policy.hpp must not include memory/detail/inner.hpp: detail/ belongs to memory/"
    "transport/fd.hpp (level 6) must not include memory/ram_map.hpp (level 3)"
    "transport/fd.hpp must not include zlib.h"
    "channel/worker.hpp must not include boost/lockfree/spsc_queue.hpp"
    "channel/worker.hpp must not include multifd/compress/zlib.hpp"
    "channel/worker.hpp must not include \"worker_detail.hpp\""
    "testing/check.hpp must not include multifd/multifd.hpp"
    "testing/check.hpp (level 9) must not include multifd.hpp (level 9)"
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
