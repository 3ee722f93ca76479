# SPDX-License-Identifier: MIT
#
# The library: INTERFACE targets multifd::core, multifd::zlib, multifd::igzip, multifd::zstd, multifd::tls,
# multifd::openssl, and multifd::multifd = all of them.
# Each owns its headers as a file set. Headers are found by glob, so that a new header needs no edit here.

# GLOBAL: an imported target is otherwise unknown to the directory that did add_subdirectory(multifd).
find_package(Threads REQUIRED GLOBAL)
find_package(PkgConfig REQUIRED)
pkg_check_modules(libxxhash REQUIRED IMPORTED_TARGET GLOBAL libxxhash)
pkg_check_modules(libisal QUIET IMPORTED_TARGET GLOBAL libisal)
pkg_check_modules(libgnutls QUIET IMPORTED_TARGET GLOBAL gnutls>=3.7)
pkg_check_modules(libopenssl QUIET IMPORTED_TARGET GLOBAL openssl>=3.0)

# Not beside the other options, because whether they are on depends on what was found here.
option(MULTIFD_WITH_IGZIP "Offer the component multifd::igzip (ISA-L; on where it is found)" "${libisal_FOUND}")
option(MULTIFD_WITH_TLS "Offer the component multifd::tls (GnuTLS; on where it is found)" "${libgnutls_FOUND}")
option(MULTIFD_WITH_OPENSSL "Offer the component multifd::openssl (TLS by OpenSSL; on where it is found)" "${libopenssl_FOUND}")

file(
  GLOB_RECURSE multifd_core_headers
  CONFIGURE_DEPENDS
  "${PROJECT_SOURCE_DIR}/include/multifd/*.hpp"
)
set(multifd_zlib_headers "${PROJECT_SOURCE_DIR}/include/multifd/compress/zlib.hpp")
set(multifd_igzip_headers "${PROJECT_SOURCE_DIR}/include/multifd/compress/igzip.hpp")
file(
  GLOB multifd_zstd_headers
  CONFIGURE_DEPENDS
  "${PROJECT_SOURCE_DIR}/include/multifd/compress/zstd*.hpp"
  "${PROJECT_SOURCE_DIR}/include/multifd/image/seekable_zstd*.hpp"
  "${PROJECT_SOURCE_DIR}/include/multifd/image/detail/*zstd*.hpp"
)
file(
  GLOB multifd_tls_headers
  CONFIGURE_DEPENDS
  "${PROJECT_SOURCE_DIR}/include/multifd/transport/tls*.hpp"
  "${PROJECT_SOURCE_DIR}/include/multifd/transport/detail/tls*.hpp"
)
# Of both libraries, as basic_tls*.hpp.
list(REMOVE_ITEM multifd_tls_headers "${PROJECT_SOURCE_DIR}/include/multifd/transport/tls_options.hpp")
file(
  GLOB multifd_openssl_headers
  CONFIGURE_DEPENDS
  "${PROJECT_SOURCE_DIR}/include/multifd/transport/openssl*.hpp"
  "${PROJECT_SOURCE_DIR}/include/multifd/transport/detail/openssl*.hpp"
  "${PROJECT_SOURCE_DIR}/include/multifd/migrate/gmac.hpp"
)
list(
  REMOVE_ITEM
  multifd_core_headers
  ${multifd_zlib_headers}
  ${multifd_igzip_headers}
  ${multifd_zstd_headers}
  ${multifd_tls_headers}
  ${multifd_openssl_headers}
)

# multifd_component(<name> HEADERS ... LINKS ...)
function(multifd_component name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "HEADERS;LINKS")
  set(target multifd_${name})
  add_library(${target} INTERFACE)
  add_library(multifd::${name} ALIAS ${target})
  set_target_properties(
    ${target}
    PROPERTIES EXPORT_NAME ${name} VERIFY_INTERFACE_HEADER_SETS ${PROJECT_IS_TOP_LEVEL}
  )
  target_compile_features(${target} INTERFACE cxx_std_23)
  target_link_libraries(${target} INTERFACE ${arg_LINKS})
  set(present)
  foreach(header IN LISTS arg_HEADERS)
    if(EXISTS "${header}")
      list(APPEND present "${header}")
    endif()
  endforeach()
  target_sources(
    ${target}
    INTERFACE FILE_SET HEADERS BASE_DIRS "${PROJECT_SOURCE_DIR}/include" FILES ${present}
  )
endfunction()

# Headers of the other machine's kernels are installed but cannot be compiled here: no language, no verification.
if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set_source_files_properties("${PROJECT_SOURCE_DIR}/include/multifd/zero/detail/neon.hpp" PROPERTIES LANGUAGE NONE)
endif()
if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set_source_files_properties("${PROJECT_SOURCE_DIR}/include/multifd/zero/detail/x86.hpp" PROPERTIES LANGUAGE NONE)
endif()

multifd_component(core HEADERS ${multifd_core_headers} LINKS Threads::Threads PkgConfig::libxxhash)
set(multifd_components core)

if(MULTIFD_WITH_ZLIB)
  find_package(ZLIB REQUIRED GLOBAL)
  multifd_component(zlib HEADERS ${multifd_zlib_headers} LINKS multifd_core ZLIB::ZLIB)
  list(APPEND multifd_components zlib)
endif()

if(MULTIFD_WITH_IGZIP)
  pkg_check_modules(libisal REQUIRED IMPORTED_TARGET GLOBAL libisal)
  multifd_component(igzip HEADERS ${multifd_igzip_headers} LINKS multifd_core PkgConfig::libisal)
  list(APPEND multifd_components igzip)
  # For our own programs, tests and benchmarks, which have to build without it; no header of the library looks at it,
  # and no user of the targets sees it.
  add_compile_definitions(MULTIFD_HAS_IGZIP)
endif()

if(MULTIFD_WITH_ZSTD)
  pkg_check_modules(libzstd REQUIRED IMPORTED_TARGET GLOBAL libzstd)
  multifd_component(zstd HEADERS ${multifd_zstd_headers} LINKS multifd_core PkgConfig::libzstd)
  list(APPEND multifd_components zstd)
endif()

if(MULTIFD_WITH_TLS)
  pkg_check_modules(libgnutls REQUIRED IMPORTED_TARGET GLOBAL gnutls>=3.7)
  multifd_component(tls HEADERS ${multifd_tls_headers} LINKS multifd_core PkgConfig::libgnutls)
  list(APPEND multifd_components tls)
  add_compile_definitions(MULTIFD_HAS_TLS) # as MULTIFD_HAS_IGZIP
endif()

if(MULTIFD_WITH_OPENSSL)
  pkg_check_modules(libopenssl REQUIRED IMPORTED_TARGET GLOBAL openssl>=3.0)
  multifd_component(openssl HEADERS ${multifd_openssl_headers} LINKS multifd_core PkgConfig::libopenssl)
  list(APPEND multifd_components openssl)
  add_compile_definitions(MULTIFD_HAS_OPENSSL) # as MULTIFD_HAS_IGZIP
endif()

set(multifd_component_targets ${multifd_components})
list(TRANSFORM multifd_component_targets PREPEND multifd_)
multifd_component(multifd LINKS ${multifd_component_targets})
