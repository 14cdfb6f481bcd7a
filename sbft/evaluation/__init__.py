"""What a trained model is worth: losses, answers, and public benchmarks."""
