#include "bind/core/text_ngrams.h"
namespace lutra { py::object text_ngrams() { return py::none(); } }
