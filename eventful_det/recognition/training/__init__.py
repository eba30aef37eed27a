"""Training of recognisers: end to end, or in two stages as in the paper."""
