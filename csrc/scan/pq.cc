#include "scan/pq.h"
namespace lutra { namespace LUTRA_NS {
void pq(const PqArgs&) {}
} }
