"""What all workers share: model, weights, tokenizer, batch, runner, sampling. No gRPC, no Ray, no Redis."""
