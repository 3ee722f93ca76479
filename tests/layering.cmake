# SPDX-License-Identifier: MIT
#
# Reads the #include lines of every header below ROOT/multifd and fails on each edge that the table does not allow.
#   cmake -D ROOT=include -P tests/layering.cmake

cmake_minimum_required(VERSION 3.24)
cmake_path(ABSOLUTE_PATH ROOT)

# The engine stands below every format: it knows no byte of any.
# A row: level, room, what it may include. A room is one header or a folder/ with all below it; the first row that
# fits a header counts. "0-3" = rooms of these levels, "+" = the same room (for a single header: headers of the same
# folder and level), "-" = nothing of ours.
set(table [[
0  version.hpp          -
0  config.hpp           -
0  limits.hpp           -
0  buffers.hpp          -
1  error.hpp            0
1  error_value.hpp      0 +
1  result.hpp           0 +
1  stats.hpp            0 +
1  time_limit.hpp       0 +
1  progress_watch.hpp   0 +
2  memory/              0-1 +
3  options.hpp          0-2
4  thread.hpp           0-3
4  zero/                0-2 +
5  ends/                0-4 +
6  engine/              0-5 +
7  peer_profile.hpp     0-3
7  format/              0-3 +
8  compress/            0-1 7 +
8  transport/capped.hpp 0-1 6 8
8  transport/connect_paths.hpp 0-4 8
8  transport/           0-1 +
9  packets/             0-8 +
9  qemu/                0-3 7-8 +
10 sender_options.hpp   0-9
10 receiver_options.hpp 0-9
11 sender.hpp           0-10
11 receiver.hpp         0-10
11 stack.hpp            0-1
11 image/               0-10 +
12 any.hpp              0-11
12 postcopy/            0-11 +
13 migrate/             0-12 +
14 multifd.hpp          0-12
14 testing/             0-13 +
]])

# Third-party headers that one header each keeps to itself, and headers of ours that nobody else includes.
# A row: beginning of the included name, the headers that may include it ("-" = none).
set(private_table [[
zlib.h                       compress/zlib.hpp
isa-l                        compress/igzip.hpp
zstd.h                       compress/zstd.hpp compress/zstd_frame.hpp
zstd_errors.h                compress/zstd.hpp
xxhash.h                     memory/page_digest.hpp
gnutls/                      transport/tls_credentials.hpp transport/detail/tls_error.hpp transport/detail/tls_engine.hpp transport/detail/tls_socket.hpp
openssl/                     migrate/gmac.hpp transport/openssl_credentials.hpp transport/detail/openssl_cipher.hpp transport/detail/openssl_error.hpp transport/detail/openssl_handshake.hpp transport/detail/openssl_keys.hpp transport/detail/openssl_records.hpp
boost/                       -
doctest                      -
multifd/multifd.hpp          -
multifd/compress/zlib.hpp    -
multifd/compress/igzip.hpp   -
multifd/compress/zstd.hpp    -
multifd/compress/zstd_frame.hpp     image/
multifd/image/seekable_zstd  image/
multifd/transport/tls.hpp    transport/tls_acceptor.hpp
multifd/transport/basic_tls.hpp  transport/tls.hpp transport/basic_tls_acceptor.hpp transport/openssl.hpp
multifd/transport/basic_tls_acceptor.hpp  transport/tls_acceptor.hpp transport/openssl_acceptor.hpp
multifd/transport/openssl.hpp  transport/openssl_acceptor.hpp
multifd/transport/tls_acceptor.hpp  -
multifd/transport/openssl_acceptor.hpp  -
multifd/migrate/gmac.hpp     -
multifd/testing/             testing/
]])
# Beside the tables: X/detail/ is included from below X/ only, names of ours are written "multifd/...", and there is
# no cycle.

function(parse_table text rows)
  string(REGEX REPLACE "\n$" "" text "${text}")
  string(REGEX REPLACE " +" " " text "${text}")
  string(REPLACE "\n" ";" text "${text}")
  set(${rows} "${text}" PARENT_SCOPE)
endfunction()
parse_table("${table}" table)
parse_table("${private_table}" private_table)

# Whether `header` is `room` or lies below it.
function(lies_in header room result)
  set(${result} FALSE PARENT_SCOPE)
  string(FIND "${header}" "${room}" at)
  if(header STREQUAL room OR (at EQUAL 0 AND room MATCHES "/$"))
    set(${result} TRUE PARENT_SCOPE)
  endif()
endfunction()

# Sets <prefix>_level, <prefix>_room, <prefix>_may for a header; the level is "" when no row fits.
function(find_row header prefix)
  set(${prefix}_level "" PARENT_SCOPE)
  foreach(row IN LISTS table)
    string(REGEX MATCH "^([0-9]+) ([^ ]+) (.*)$" _ "${row}")
    set(level "${CMAKE_MATCH_1}")
    set(room "${CMAKE_MATCH_2}")
    set(may "${CMAKE_MATCH_3}")
    lies_in("${header}" "${room}" fits)
    if(fits)
      set(${prefix}_level "${level}" PARENT_SCOPE)
      set(${prefix}_room "${room}" PARENT_SCOPE)
      set(${prefix}_may "${may}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()

set(failures 0)
macro(refuse text)
  message("layering: ${text}")
  math(EXPR failures "${failures} + 1")
endmacro()

file(GLOB_RECURSE headers RELATIVE "${ROOT}/multifd" "${ROOT}/multifd/*.hpp")
if(NOT headers)
  message(FATAL_ERROR "layering: no headers below ${ROOT}/multifd")
endif()

set(edge_count 0)
foreach(header IN LISTS headers)
  set(edges_${header})
  find_row("${header}" from)
  if(from_level STREQUAL "")
    refuse("${header} has no row in the table of tests/layering.cmake")
    continue()
  endif()
  file(STRINGS "${ROOT}/multifd/${header}" lines REGEX "^[ \t]*#[ \t]*include[ \t]*[<\"]")
  foreach(line IN LISTS lines)
    string(REGEX MATCH "include[ \t]*([<\"])([^>\"]+)[>\"]" _ "${line}")
    set(quote "${CMAKE_MATCH_1}")
    set(name "${CMAKE_MATCH_2}")

    # Headers that only some may include.
    foreach(row IN LISTS private_table)
      string(REGEX MATCH "^([^ ]+) (.*)$" _ "${row}")
      set(guarded "${CMAKE_MATCH_1}")
      string(REPLACE " " ";" owners "${CMAKE_MATCH_2}")
      string(FIND "${name}" "${guarded}" at)
      if(at EQUAL 0)
        set(allowed FALSE)
        foreach(owner IN LISTS owners)
          lies_in("${header}" "${owner}" is_owner)
          if(is_owner)
            set(allowed TRUE)
          endif()
        endforeach()
        if(NOT allowed)
          refuse("${header} must not include ${name} (only from: ${owners})")
        endif()
      endif()
    endforeach()

    # Headers of ours: the edge must go where the table says.
    if(NOT name MATCHES "^multifd/")
      if(quote STREQUAL "\"")
        refuse("${header} must not include \"${name}\": write \"multifd/...\"")
      endif()
      continue()
    endif()
    string(REGEX REPLACE "^multifd/" "" name "${name}")
    if(NOT name IN_LIST headers)
      refuse("${header} includes ${name}, which does not exist")
      continue()
    endif()
    math(EXPR edge_count "${edge_count} + 1")
    list(APPEND edges_${header} "${name}")
    find_row("${name}" to)
    if(to_level STREQUAL "")
      continue() # refused on its own
    endif()
    string(REPLACE " " ";" may "${from_may}")
    set(allowed FALSE)
    foreach(word IN LISTS may)
      if(word STREQUAL "+")
        if(from_room STREQUAL to_room OR (from_level EQUAL to_level AND NOT "${from_room}${to_room}" MATCHES "/"))
          set(allowed TRUE)
        endif()
      elseif(word MATCHES "^([0-9]+)-?([0-9]*)$")
        set(low "${CMAKE_MATCH_1}")
        set(high "${CMAKE_MATCH_2}")
        if(high STREQUAL "")
          set(high "${low}")
        endif()
        if(to_level GREATER_EQUAL low AND to_level LESS_EQUAL high)
          set(allowed TRUE)
        endif()
      endif()
    endforeach()
    if(NOT allowed)
      refuse("${header} (level ${from_level}) must not include ${name} (level ${to_level}); it may: ${from_may}")
    endif()
    if(name MATCHES "^(.*/|)detail/")
      set(owner "${CMAKE_MATCH_1}")
      string(FIND "${header}" "${owner}" at)
      if(NOT at EQUAL 0)
        refuse("${header} must not include ${name}: detail/ belongs to ${owner}")
      endif()
    endif()
  endforeach()
endforeach()

# Cycles: take away headers that include nothing that is left; what cannot be taken away hangs on a cycle.
set(left ${headers})
set(progress TRUE)
while(progress AND left)
  set(progress FALSE)
  foreach(header IN LISTS left)
    set(free TRUE)
    foreach(name IN LISTS edges_${header})
      if(name IN_LIST left)
        set(free FALSE)
      endif()
    endforeach()
    if(free)
      list(REMOVE_ITEM left "${header}")
      set(progress TRUE)
    endif()
  endforeach()
endwhile()
if(left)
  list(JOIN left ", " left)
  refuse("these headers include each other in a cycle, or include one that does: ${left}")
endif()

list(LENGTH headers header_count)
if(failures GREATER 0)
  message(FATAL_ERROR "layering: ${failures} forbidden, in ${header_count} headers, ${edge_count} edges")
endif()
message("layering: ${header_count} headers, ${edge_count} edges, all downwards")
