# SPDX-License-Identifier: MIT

function(configure components unexpected status)
  execute_process(
    COMMAND
      "${CMAKE_COMMAND}" -S "${CONSUMER}" -B "${BINARY_DIR}" -G "${GENERATOR}" "-DCMAKE_CXX_COMPILER=${COMPILER}"
      "-DCMAKE_PREFIX_PATH=${STAGE}" "-DCOMPONENTS=${components}" "-DUNEXPECTED=${unexpected}" --fresh
    RESULT_VARIABLE result
    OUTPUT_VARIABLE output
    ERROR_VARIABLE output
  )
  message("== COMPONENTS ${components}\n${output}")
  set(${status} "${result}" PARENT_SCOPE)
  string(REGEX REPLACE "[ \n]+" " " output "${output}") # CMake wraps messages
  set(output "${output}" PARENT_SCOPE)
endfunction()

# The message names what is missing, and what there is.
function(expect_message part)
  string(FIND "${output}" "${part}" at)
  if(at EQUAL -1)
    message(FATAL_ERROR "no word of \"${part}\"")
  endif()
endfunction()

configure(core "multifd::zlib;multifd::igzip;multifd::zstd;multifd::tls;multifd::openssl;multifd::multifd;ZLIB::ZLIB;PkgConfig::libisal;PkgConfig::libzstd;PkgConfig::libgnutls;PkgConfig::libopenssl" status)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "find_package(multifd COMPONENTS core) failed")
endif()
configure(zstd "multifd::zlib;multifd::igzip;multifd::tls;multifd::openssl;ZLIB::ZLIB;PkgConfig::libisal" status)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "find_package(multifd COMPONENTS zstd) failed")
endif()
foreach(components IN ITEMS teleport "core;lz4" "lz4;teleport")
  configure("${components}" "" status)
  if(status EQUAL 0)
    message(FATAL_ERROR "find_package(multifd COMPONENTS ${components}) succeeded")
  endif()
  list(REMOVE_ITEM components core)
  foreach(component IN LISTS components)
    expect_message("there is no component ${component} in this installation, which has core, zlib")
  endforeach()
endforeach()
# A component whose library is not there: pkg-config knows of nothing but xxHash.
execute_process(
  COMMAND pkg-config --variable=pcfiledir libxxhash
  OUTPUT_VARIABLE folder
  OUTPUT_STRIP_TRAILING_WHITESPACE
  COMMAND_ERROR_IS_FATAL ANY
)
file(COPY "${folder}/libxxhash.pc" DESTINATION "${BINARY_DIR}/only_xxhash")
set(ENV{PKG_CONFIG_LIBDIR} "${BINARY_DIR}/only_xxhash")
configure(zstd "" status)
if(status EQUAL 0)
  message(FATAL_ERROR "find_package(multifd COMPONENTS zstd) succeeded without libzstd")
endif()
expect_message("the component zstd needs libzstd, which was not found")
configure(core "" status)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "find_package(multifd COMPONENTS core) failed without libzstd")
endif()
