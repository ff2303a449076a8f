"""From logits to tokens (`sampler`), with what requests change in logits and weights, and the logprobs that
they ask for."""
