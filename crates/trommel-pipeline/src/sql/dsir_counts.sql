-- ngram_counts(text): how many n-grams of the windows of one input file fall into each bucket.  [DS]
-- in:  texts(text, ...)
-- out: domain (the corpus is `corpus`), bucket, count
SELECT '{source}' AS domain, c['bucket'] AS bucket, c['count'] AS count
FROM (SELECT unnest(ngram_counts(text)) AS c FROM texts)
