"""The loss's Triton kernels, behind `calsmooth.loss.fused`.

Design: one walk over the vocabulary serves everything (`walk`); what a mode adds to it has a file of its own:

    configurations   block sizes by architecture and shape; how programs share tokens and vocabulary
    tiles            a tile of E C^T, and from products to logits
    walk             log-sum-exp, losses, top-1, entropy; group maxima for `filtered`, logits for `capped`
    exact, capped    gradients in the forward, three products: without a softcap, and with one
    whole            the same where all logits fit into one buffer: fewer launches
    gradient, lean   gradients from known log-sum-exps, a strip of the vocabulary at a time
    listing          the entries that reach `filter_eps`, sorted by column and by token
    filtered         gradients from those and the others' mean
    rows, products   small steps over tokens and features; what cuBLAS does

Semantics: every option of `linear_cross_entropy` in every mode. Modes differ in how gradients are made:

    exact      mean or sum, bfloat16, no gradient for a bias: in the forward, three products; else as lean does it
    lean       in the backward, four products, a strip of logits at a time
    filtered   listed in the forward, gathered in the backward; the only one that waits for the device (one number)

Guards: targets far below the top of their row, lists that overflow, ignored tokens that hold NaN, offsets beyond
2^31, rows that descriptors can't address. All results are the same bits from run to run.

How fast, with how much memory and at what error, beside the peers: examples/benchmarks.
"""
