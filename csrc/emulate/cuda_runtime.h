// What the kernels and their host code use of CUDA, for a C++ compiler: see machine.h.
#pragma once
#include "emulate/device_code.h"
#include "emulate/runtime.h"
