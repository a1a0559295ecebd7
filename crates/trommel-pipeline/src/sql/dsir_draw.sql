-- The windows of one corpus file that are selected, each of them once, in the pseudo-random order of the shards.
-- in:  scores(row, window, domain, key, ...), selection(domain, key_min), assigned(row, window, document, cluster_id, text)
-- out: domain, shuffle, document, window, copy, cluster_id, text
SELECT domain, d['shuffle'] AS shuffle, document, window, d['copy'] AS copy, cluster_id, text
FROM (SELECT s.domain, a.document, a.window, a.cluster_id, a.text,
             unnest(draws(s.domain, a.document, a.window, CAST(1.0 AS DOUBLE))) AS d
      FROM scores AS s JOIN selection ON selection.domain = s.domain AND s.key >= selection.key_min
      JOIN assigned AS a ON a.row = s.row AND a.window = s.window)
ORDER BY domain, shuffle, octet_length(text), cluster_id
