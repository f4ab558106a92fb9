"""Search: hyper-parameters by trials, and which modules at which sites by evolution over a trained supernet."""
