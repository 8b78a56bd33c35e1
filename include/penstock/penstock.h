// SPDX-License-Identifier: Apache-2.0
//
// Everything a C++ user needs: #include <penstock/penstock.h>, link penstock::penstock.
#pragma once

#include "penstock/adapters.h"
#include "penstock/backend.h"
#include "penstock/device.h"
#include "penstock/dtype.h"
#include "penstock/error.h"
#include "penstock/experts.h"
#include "penstock/memory.h"
#include "penstock/routing.h"
#include "penstock/tensor.h"
#include "penstock/version.h"
