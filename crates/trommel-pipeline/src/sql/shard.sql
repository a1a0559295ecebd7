-- tokenize(text): the draws of one domain whose place in the shuffled order lies in one range, as training windows.
-- in:  draws(domain, shuffle, document, window, cluster_id, text, ...)
-- out: document, window, text, tokens, cluster_id
SELECT document, window, text, tokenize(text) AS tokens, cluster_id
FROM draws
WHERE domain = '{domain}' AND shuffle >= {first} AND shuffle <= {last}
ORDER BY shuffle, octet_length(text), cluster_id
