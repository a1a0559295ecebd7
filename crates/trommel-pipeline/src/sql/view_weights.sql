-- The table `weights`: the importance weights, and what the token budget makes of them (null before `resample`).
SELECT w.domain, w.cluster_id, w.p_domain, w.p_corpus, w.weight, r.expected_draws, r.epochs
FROM weigh AS w LEFT JOIN rates AS r ON r.domain = w.domain AND r.cluster_id = w.cluster_id
