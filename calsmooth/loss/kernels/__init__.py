"""The loss's Triton kernels, behind `calsmooth.loss.fused`.

Design: one walk over the vocabulary serves everything (`walk`); what a mode adds to it has a file of its own:

    configurations   block sizes by architecture and shape; how programs share tokens and vocabulary
    tiles            a tile of E C^T, and from products to logits
    walk             log-sum-exp, losses, top-1, entropy; group maxima for `filtered`, logits for `capped`
    exact, capped    gradients in the forward, three products: without a softcap, and with one
    whole            the same where all logits fit into one buffer: fewer launches
    gradient, lean   gradients from known log-sum-exps, a strip of the vocabulary at a time
    filtered         gradients from the entries that reach `filter_eps`
    rows, products   small steps over tokens and features; what cuBLAS does

Semantics: every option of `linear_cross_entropy` in every mode. Modes differ in how gradients are made:

    exact      mean or sum, bfloat16, no gradient for a bias: in the forward, three products; else as lean does it
    lean       in the backward, four products, a strip of logits at a time
    filtered   listed in the forward, gathered in the backward; the only one that waits for the device (one number)

Guards: targets far below the top of their row, lists that overflow, ignored tokens that hold NaN, offsets beyond
2^31, rows that descriptors can't address. All results are the same bits from run to run.

Measured on one H100 80GB HBM3 (torch 2.11.0+cu130, triton 3.6.0), 8192 tokens, V = 256000, D = 2304, bfloat16,
label_smoothing = 0.1, logits distributed like a real model's (113 entries a token reach 2^-12), medians of one run.
Memory is the peak above the inputs; the gradients alone are 1161 MiB of it.

    E @ C.T by cuBLAS, for scale          12.9 ms    4000 MiB
    forward only                          14.5 ms       0 MiB
    forward with token statistics         15.3 ms       0 MiB
    exact                                 43.5 ms    2189 MiB
    exact, softcap 30                     47.0 ms    2188 MiB
    exact, frozen head                    30.6 ms    1055 MiB
    lean                                  60.6 ms    1346 MiB
    filtered, eps 2^-12                   20.7 ms    1226 MiB    (21.4 ms when measured again)
    filtered, eps 2^-14                   24.8 ms    1310 MiB
    filtered, eps 2^-16                   31.8 ms    1500 MiB

Gradient error against float64 (1000 tokens, V = 16411, D = 520): exact 2.7e-3 (E) and 2.8e-3 (C); torch's own path with
bfloat16 logits 1.5e-2 and 1.7e-2; filtered at 2^-12, which drops 1 % of the mass there, 1.1e-2 and 2.2e-3. A call
takes 2.5 to 3.5 ms of the host's time, which shows where the device needs less than that.
"""
