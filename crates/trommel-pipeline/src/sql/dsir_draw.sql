-- The windows of one corpus file that are selected, each of them once, in the pseudo-random order of the shards.
-- in:  scores(document, window, row, domain, key, ...), selection(domain, key_min), assignments(row, window, cluster_id, ...),
--      texts(row, window, text)
-- out: domain, shuffle, document, window, copy, cluster_id, text
WITH drawn AS (
  SELECT s.domain, s.document, s.window, s.row, a.cluster_id,
         unnest(draws(s.domain, s.document, s.window, CAST(1.0 AS DOUBLE))) AS d
  FROM scores AS s JOIN selection ON selection.domain = s.domain AND s.key >= selection.key_min
  JOIN assignments AS a ON a.row = s.row AND a.window = s.window
)
SELECT drawn.domain, drawn.d['shuffle'] AS shuffle, drawn.document, drawn.window, drawn.d['copy'] AS copy, drawn.cluster_id, texts.text
FROM drawn JOIN texts ON texts.row = drawn.row AND texts.window = drawn.window
ORDER BY domain, shuffle, octet_length(texts.text), drawn.cluster_id
