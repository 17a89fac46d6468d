"""One request's life: admission, placement, dispatch, streams. No torch, no Ray."""
