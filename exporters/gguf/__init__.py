"""Files for llama.cpp: layouts of the families, vocabulary, writing, and the proof."""
