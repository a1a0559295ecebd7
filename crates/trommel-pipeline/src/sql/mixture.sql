-- The histogram of each mixture of domains, the weighted mean of its domains': share_c = sum_d share_d * P(c | d).
-- Counts are such that the whole mixture holds as many windows as its domains together, N: a window of domain d counts as
-- share_d * N / N_d windows, and so do its bytes. They are rounded; `share` is not.
-- in:  histograms(domain, cluster_id, windows, bytes, share), mixtures(mixture, domain, share)
-- out: domain (the mixture), cluster_id, windows, bytes, share
WITH members AS (
  SELECT m.mixture, m.share AS part, h.cluster_id, h.windows, h.bytes, h.share,
         CAST(sum(h.windows) OVER (PARTITION BY m.mixture) AS DOUBLE) AS all_windows,
         CAST(sum(h.windows) OVER (PARTITION BY m.mixture, m.domain) AS DOUBLE) AS own_windows
  FROM mixtures AS m JOIN histograms AS h ON h.domain = m.domain
)
SELECT mixture AS domain, cluster_id,
       CAST(round(sum(part * all_windows / own_windows * windows)) AS BIGINT) AS windows,
       CAST(round(sum(part * all_windows / own_windows * bytes)) AS BIGINT) AS bytes,
       sum(part * share) AS share
FROM members GROUP BY mixture, cluster_id ORDER BY domain, cluster_id
