#include "scan/knn.h"
namespace lutra { namespace LUTRA_NS {
void knn(const KnnArgs&) {}
void rescore(const RescoreArgs&) {}
} }
