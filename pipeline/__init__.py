"""The four stages: index, targets, train, evaluate. One module each."""
