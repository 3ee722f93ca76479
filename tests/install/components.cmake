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
endfunction()

configure(core "multifd::zlib;multifd::igzip;multifd::zstd;multifd::tls;multifd::multifd;ZLIB::ZLIB;PkgConfig::libisal;PkgConfig::libzstd;PkgConfig::libgnutls" status)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "find_package(multifd COMPONENTS core) failed")
endif()
configure(zstd "multifd::zlib;multifd::igzip;multifd::tls;ZLIB::ZLIB;PkgConfig::libisal" status)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "find_package(multifd COMPONENTS zstd) failed")
endif()
configure(teleport "" status)
if(status EQUAL 0)
  message(FATAL_ERROR "find_package(multifd COMPONENTS teleport) succeeded")
endif()
