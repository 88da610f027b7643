// Hashed n-grams of strings; the contract is in text_ngrams.cc.
#pragma once
#include "bind/core/intake.h"

namespace lutra {
py::object text_ngrams();
}
