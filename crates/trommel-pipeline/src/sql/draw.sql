-- draws(domain, document, window, rate): the copies of each window of one input file that are drawn, for every domain at
-- once, in the pseudo-random order of the shards.
-- in:  assignments(document, window, row, cluster_id, ...), rates(domain, cluster_id, rate), texts(row, window, text)
-- out: domain, shuffle, document, window, copy, cluster_id, text
WITH drawn AS (
  SELECT domain, document, window, row, cluster_id, unnest(draws(domain, document, window, rate)) AS d
  FROM (SELECT rates.domain, a.document, a.window, a.row, a.cluster_id, rates.rate
        FROM rates JOIN assignments AS a ON a.cluster_id = rates.cluster_id WHERE rates.rate > 0)
)
SELECT drawn.domain, drawn.d['shuffle'] AS shuffle, drawn.document, drawn.window, drawn.d['copy'] AS copy, drawn.cluster_id, texts.text
FROM drawn JOIN texts ON texts.row = drawn.row AND texts.window = drawn.window
WHERE drawn.d IS NOT NULL
ORDER BY domain, shuffle, octet_length(texts.text), drawn.cluster_id
