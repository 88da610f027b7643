#include "gather/bag.h"
namespace lutra { namespace LUTRA_NS {
void bag(const BagArgs&) {}
void bag_sort(const BagSortArgs&) {}
void bag_backward(const BagBackwardArgs&) {}
void bag_weight_grad(const BagWeightGradArgs&) {}
} }
