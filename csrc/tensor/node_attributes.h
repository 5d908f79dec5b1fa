// What Python sees of a graph node.
#pragma once

namespace bnext {

// Gives grad_fn the attributes that torch's own batch norm gives it: _saved_input, _saved_weight, _saved_result1
// (the means), _saved_result2 (1/sqrt(var + eps)), _saved_training and _saved_eps.
void register_node_attributes();

}  // namespace bnext
