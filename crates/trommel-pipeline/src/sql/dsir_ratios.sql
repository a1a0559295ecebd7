-- The bags of n-grams: p_domain_b = count_b / sum of counts, and p_corpus_b likewise.  [DS]
-- in:  counts(domain, bucket, count)
-- out: domain, bucket, p_domain, p_corpus
WITH sums AS (
  SELECT domain, bucket, sum(count) AS count FROM counts GROUP BY domain, bucket
), shares AS (
  SELECT domain, bucket, CAST(count AS DOUBLE) / CAST(sum(count) OVER (PARTITION BY domain) AS DOUBLE) AS p FROM sums
)
SELECT d.domain, d.bucket, d.p AS p_domain, c.p AS p_corpus
FROM shares AS d JOIN shares AS c ON c.domain = 'corpus' AND c.bucket = d.bucket
WHERE d.domain <> 'corpus'
ORDER BY d.domain, d.bucket
