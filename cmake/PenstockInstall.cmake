# SPDX-License-Identifier: Apache-2.0
#
# What `cmake --install` lays down: libraries, public headers, and the files that make
# find_package(penstock) work. A wheel gets the same tree under penstock/ (penstock/lib,
# penstock/include), and every library finds its neighbours through $ORIGIN, so the tree can move.

include(CMakePackageConfigHelpers)

if(NOT PENSTOCK_WHEEL)
  # Before 1.0 a minor version may change the binary interface. A wheel is a zip file and holds no
  # symbolic links, so its libraries have no versioned names.
  set_target_properties(penstock PROPERTIES
    VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
endif()

set(penstock_libraries penstock)
foreach(extra IN ITEMS penstock_ffi penstock_cuda)
  if(TARGET ${extra})
    list(APPEND penstock_libraries ${extra})
  endif()
endforeach()
set_target_properties(${penstock_libraries} PROPERTIES
  BUILD_RPATH_USE_ORIGIN ON INSTALL_RPATH "$ORIGIN" INSTALL_REMOVE_ENVIRONMENT_RPATH ON)

# Only the core can be linked against; the binding and the GPU backend are loaded at run time.
list(REMOVE_ITEM penstock_libraries penstock)
install(TARGETS penstock EXPORT penstockTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(penstock_libraries)
  install(TARGETS ${penstock_libraries} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()

install(DIRECTORY include/penstock DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  FILES_MATCHING PATTERN "*.h")
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/include/penstock/version.h
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/penstock)

set(penstock_cmakedir ${CMAKE_INSTALL_LIBDIR}/cmake/penstock)
install(EXPORT penstockTargets NAMESPACE penstock:: DESTINATION ${penstock_cmakedir})
configure_package_config_file(cmake/penstockConfig.cmake.in
  ${CMAKE_CURRENT_BINARY_DIR}/penstockConfig.cmake
  INSTALL_DESTINATION ${penstock_cmakedir} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/penstockConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/penstockConfig.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/penstockConfigVersion.cmake
  DESTINATION ${penstock_cmakedir})
