namespace { __global__ void k() {} }
