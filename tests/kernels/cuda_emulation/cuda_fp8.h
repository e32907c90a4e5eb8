#include "emulation.h"  // instead of the CUDA toolkit's
