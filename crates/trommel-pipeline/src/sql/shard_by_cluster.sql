-- tokenize(text): the whole corpus as training windows, cluster by cluster, each in its own pseudo-random order.
-- in:  draws(domain, shuffle, document, window, cluster_id, text, ...)
-- out: document, window, text, tokens, cluster_id
SELECT document, window, text, tokenize(text) AS tokens, cluster_id
FROM draws
WHERE domain = 'corpus' AND cluster_id >= {first}
ORDER BY cluster_id, shuffle, octet_length(text)
