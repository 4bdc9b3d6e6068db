"""The loss at the end of the model: token chunks, the head product on vocabulary shards, the objective, gradients."""
