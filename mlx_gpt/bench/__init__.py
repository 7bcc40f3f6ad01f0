"""``mlx-gpt bench``: this machine's limits, and the speed of training and generation beside other implementations."""
