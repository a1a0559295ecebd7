-- ngram_counts(text): how many n-grams of the windows of one input file fall into each bucket.  [DS 3]
-- in:  texts(text, ...)
-- out: domain (the corpus is `corpus`), bucket, count
SELECT '{source}' AS domain, unnest(range(0, {buckets})) AS bucket, unnest(counts) AS count
FROM (SELECT ngram_counts(text) AS counts FROM texts)
