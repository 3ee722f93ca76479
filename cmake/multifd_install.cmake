# SPDX-License-Identifier: MIT
#
# Installs the headers, a CMake package and a pkg-config file. One export set per component, so that
# find_package(multifd COMPONENTS core) needs nothing of the compressors' libraries.

include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(package_dir "${CMAKE_INSTALL_DATADIR}/cmake/multifd")

foreach(component IN LISTS multifd_components ITEMS multifd)
  install(TARGETS multifd_${component} EXPORT multifd_${component}_targets FILE_SET HEADERS)
  install(
    EXPORT multifd_${component}_targets
    NAMESPACE multifd::
    DESTINATION "${package_dir}"
    FILE multifd_${component}_targets.cmake
  )
endforeach()

# The formats' text lies beside the headers that cite it.
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/multifd/format" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/multifd")

configure_package_config_file(
  "${CMAKE_CURRENT_LIST_DIR}/multifdConfig.cmake.in"
  "${CMAKE_CURRENT_BINARY_DIR}/multifdConfig.cmake"
  INSTALL_DESTINATION "${package_dir}"
)
write_basic_package_version_file(
  "${CMAKE_CURRENT_BINARY_DIR}/multifdConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion # until 1.0 a minor version may break
  ARCH_INDEPENDENT
)
install(
  FILES
    "${CMAKE_CURRENT_BINARY_DIR}/multifdConfig.cmake"
    "${CMAKE_CURRENT_BINARY_DIR}/multifdConfigVersion.cmake"
  DESTINATION "${package_dir}"
)

# pkg-config knows no components: multifd.pc is everything this build offers.
set(multifd_pc_requires libxxhash)
if(MULTIFD_WITH_ZLIB)
  list(APPEND multifd_pc_requires zlib)
endif()
if(MULTIFD_WITH_IGZIP)
  list(APPEND multifd_pc_requires libisal)
endif()
if(MULTIFD_WITH_ZSTD)
  list(APPEND multifd_pc_requires libzstd)
endif()
if(MULTIFD_WITH_TLS)
  list(APPEND multifd_pc_requires "gnutls >= 3.7")
endif()
if(MULTIFD_WITH_OPENSSL)
  list(APPEND multifd_pc_requires "openssl >= 3.0")
endif()
list(JOIN multifd_pc_requires ", " multifd_pc_requires)
cmake_path(SET pc_dir "${CMAKE_INSTALL_DATADIR}/pkgconfig")
if(IS_ABSOLUTE "${CMAKE_INSTALL_INCLUDEDIR}" OR IS_ABSOLUTE "${CMAKE_INSTALL_DATADIR}")
  set(multifd_pc_includedir "${CMAKE_INSTALL_FULL_INCLUDEDIR}")
else()
  # Relative to the file itself, so that an installed tree may be moved.
  file(RELATIVE_PATH up "/${pc_dir}" "/")
  cmake_path(SET multifd_pc_includedir "\${pcfiledir}/${up}${CMAKE_INSTALL_INCLUDEDIR}")
endif()
configure_file("${CMAKE_CURRENT_LIST_DIR}/multifd.pc.in" "${CMAKE_CURRENT_BINARY_DIR}/multifd.pc" @ONLY)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/multifd.pc" DESTINATION "${pc_dir}")
