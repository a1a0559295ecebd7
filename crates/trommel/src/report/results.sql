-- Columns in: those of the table `results`. Columns out: those of an `Outcome`, whose shared cost is one value.
SELECT domain, method, variant, seed, stage, perplexity, stderr, bits_per_byte, train_tokens, seconds, flops,
       named_struct('tokens', generic_tokens, 'seconds', generic_seconds, 'flops', generic_flops) AS generic
FROM results
