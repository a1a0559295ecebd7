-- draws(domain, document, window, rate): the copies of each window of one input file that are drawn, for every domain at
-- once, in the pseudo-random order of the shards.
-- in:  assigned(document, window, cluster_id, text, ...), rates(domain, cluster_id, rate)
-- out: domain, shuffle, document, window, copy, cluster_id, text
SELECT domain, d['shuffle'] AS shuffle, document, window, d['copy'] AS copy, cluster_id, text
FROM (SELECT rates.domain, a.document, a.window, a.cluster_id, a.text,
             unnest(draws(rates.domain, a.document, a.window, rates.rate)) AS d
      FROM rates JOIN assigned AS a ON a.cluster_id = rates.cluster_id WHERE rates.rate > 0)
WHERE d IS NOT NULL
ORDER BY domain, shuffle, octet_length(text), cluster_id
