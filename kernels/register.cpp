// The CPU kernels of the operators that trelm_ds/ops/library.py declares in namespace trelm.
#include <torch/library.h>

#include "masked_adamw.h"
#include "neuron_scores.h"
#include "path_weight_grad.h"
#include "select_paths.h"

TORCH_LIBRARY_IMPL(trelm, CPU, library) {
  library.impl("neuron_scores", &trelm::neuron_scores);
  library.impl("select_paths", &trelm::select_paths);
  library.impl("path_weight_grad", &trelm::path_weight_grad);
  library.impl("masked_adamw_", &trelm::masked_adamw_);
}
