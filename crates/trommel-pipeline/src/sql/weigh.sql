-- Importance weights: weight_c = (p_domain_c / p_corpus_c) ^ (1 / temperature).  [PE 2.4]; smoothing and temperature are
-- our options: p_domain_c = (windows_c + smoothing) / (windows + smoothing * clusters), where windows_c = share_c * windows (the
-- counts of a mixture are rounded). Without them the formula is the paper's. A cluster that is empty in the corpus has nothing
-- to draw: weight 0, and its mass is reported as lost.
-- in:  histograms(domain, cluster_id, windows, bytes, share)
-- out: domain, cluster_id, p_domain, p_corpus, weight
WITH corpus AS (
  SELECT cluster_id, share AS p_corpus FROM histograms WHERE domain = 'corpus'
), totals AS (
  SELECT domain, cluster_id, share, CAST(sum(windows) OVER (PARTITION BY domain) AS DOUBLE) AS total,
         sum(windows) OVER (PARTITION BY domain) + {smoothing} * count(*) OVER (PARTITION BY domain) AS smoothed
  FROM histograms WHERE domain <> 'corpus'
), domains AS (
  SELECT domain, cluster_id, share * (total / smoothed) + {smoothing} / smoothed AS p_domain FROM totals
)
SELECT domain, domains.cluster_id, p_domain, p_corpus,
       CASE WHEN p_corpus > 0 AND p_domain > 0 THEN power(p_domain / p_corpus, {exponent}) ELSE 0.0 END AS weight
FROM domains JOIN corpus ON corpus.cluster_id = domains.cluster_id
ORDER BY domain, domains.cluster_id
