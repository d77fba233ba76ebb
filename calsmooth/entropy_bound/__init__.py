"""How confident a language-model head can be: section 4 of the paper (Lemma 4.1, Theorem 4.2) and its Figure 4."""
