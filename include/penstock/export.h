// SPDX-License-Identifier: Apache-2.0
//
// Marks what libpenstock exports; everything else is hidden.
#pragma once

#define PENSTOCK_API __attribute__((visibility("default")))
