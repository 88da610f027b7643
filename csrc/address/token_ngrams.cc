#include "address/token_ngrams.h"
namespace lutra { namespace LUTRA_NS {
void token_ngrams(const TokenNgramsArgs&) {}
} }
