-- The bags of n-grams: p_domain_b = count_b / sum of counts, and p_corpus_b likewise.  [DS]; the bag of a mixture is the weighted
-- mean of its domains': p_domain_b = sum_d share_d * p_(d,b).
-- in:  counts(domain, bucket, count), mixtures(mixture, domain, share)
-- out: domain, bucket, p_domain, p_corpus
WITH sums AS (
  SELECT domain, bucket, sum(count) AS count FROM counts GROUP BY domain, bucket
), shares AS (
  SELECT domain, bucket, CAST(count AS DOUBLE) / CAST(sum(count) OVER (PARTITION BY domain) AS DOUBLE) AS p FROM sums
), domains AS (
  SELECT domain, bucket, p FROM shares WHERE domain <> 'corpus'
  UNION ALL
  SELECT m.mixture AS domain, s.bucket, sum(m.share * s.p) AS p
  FROM mixtures AS m JOIN shares AS s ON s.domain = m.domain GROUP BY m.mixture, s.bucket
)
SELECT d.domain, d.bucket, d.p AS p_domain, c.p AS p_corpus
FROM domains AS d JOIN shares AS c ON c.domain = 'corpus' AND c.bucket = d.bucket
ORDER BY d.domain, d.bucket
